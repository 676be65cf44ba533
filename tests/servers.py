"Real servers on loopback, for the tests and the notebooks about API teachers."
import contextlib, http.server, json, subprocess, sys, tempfile, threading
from pathlib import Path

LLAMA = """
import sys, xllamacpp as x
p = x.CommonParams()
p.model.path, p.hostnames, p.port, p.n_ctx, p.n_parallel, p.warmup = sys.argv[1], ['127.0.0.1'], int(sys.argv[2]), 2048, 2, False
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32       # half-precision keys and values alone cost 0.02
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
server = x.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()                                                  # until the test closes the pipe
"""


@contextlib.contextmanager
def llama_server(gguf, port=0):
    "llama.cpp's own server, from the wheel xllamacpp, in a process of its own. Gives its address and the process."
    with subprocess.Popen([sys.executable, '-c', LLAMA, str(gguf), str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try: yield process.stdout.readline().strip() + '/v1', process
        finally: process.kill()


@contextlib.contextmanager
def served(spec):
    "A model behind llama.cpp's server, in float32."
    from opd_nb.tools.export_gguf import export_gguf
    with tempfile.TemporaryDirectory() as d:
        with llama_server(export_gguf(spec, Path(d) / 'model.gguf', 'f32')) as (url, process): yield url, process


@contextlib.contextmanager
def command_server(*words, patience=180, **env):
    "A server started by a command that has `{port}` in it, once it answers. Gives its address."
    import os, signal, socket, time, urllib.error, urllib.request
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    process = subprocess.Popen([w.format(port=port) for w in words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | env, start_new_session=True)
    try:
        for _ in range(patience * 2):
            time.sleep(.5)
            assert process.poll() is None, f'{words[:3]} ended with {process.returncode}'
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/v1/models', timeout=5).read(); break
            except urllib.error.HTTPError: break  # it answers, if only with an error
            except OSError: pass
        yield f'http://127.0.0.1:{port}/v1'
    finally:
        with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.wait()


def vllm_server(python, folder):
    "vLLM, of the environment that has this interpreter, in float32 on a CPU."
    words = f'-m vllm.entrypoints.openai.api_server --model {folder} --port {{port}} --host 127.0.0.1 --dtype float32 --max-model-len 256 --max-logprobs -1 --enforce-eager --distributed-executor-backend uni'
    return command_server(python, *words.split(), patience=400, HF_HUB_OFFLINE='1', VLLM_NO_USAGE_STATS='1', VLLM_CPU_KVCACHE_SPACE='1', TORCHDYNAMO_DISABLE='1', VLLM_ENABLE_V1_MULTIPROCESSING='0')


def padded(spec, folder, size=32):
    "The same function with heads of a size that vLLM has: zeros in both halves, frequencies and scale kept."
    import copy
    from dataclasses import replace
    import torch
    from opd_nb.models.lm import LM
    lm = LM.load(spec, dtype='float32', device='cpu')
    if lm.model.config.head_dim < size:
        config, d = copy.deepcopy(lm.model.config), lm.model.config.head_dim
        theta = config.rope_parameters['rope_theta'] ** (size / d)
        config.head_dim, config.rope_parameters = size, dict(config.rope_parameters, rope_theta=theta)
        wide, state = type(lm.model)(config).eval(), lm.model.state_dict()
        for key, w in state.items():
            if 'self_attn' not in key: continue
            w = w.T if 'o_proj' in key else w
            both = w.reshape(-1, 2, d // 2, w.shape[1])
            zeros = torch.zeros_like(both)[:, :, :1].expand(-1, -1, (size - d) // 2, -1)
            scale = (size / d) ** .5 if 'q_proj' in key else 1
            w = torch.cat([both, zeros], 2).reshape(-1, w.shape[1]) * scale
            state[key] = w.T if 'o_proj' in key else w
        wide.load_state_dict(state)
        ids = torch.arange(3, 60)[None]
        with torch.no_grad(): torch.testing.assert_close(wide(ids).logits, lm.model(ids).logits, atol=1e-4, rtol=1e-4)
        lm = replace(lm, model=wide)
    lm.model.save_pretrained(folder, safe_serialization=True)
    lm.codec.tok.save_pretrained(folder)
    return folder


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *a): pass
    def body(self): return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    def send(self, code, answer, **headers):
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(code)
        for k, v in ({'Content-Type': 'application/json', 'Content-Length': len(data)} | headers).items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers(); self.wfile.write(data)


@contextlib.contextmanager
def http_server(handler):
    "An HTTP server in a thread. Gives its address."
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally: server.shutdown(); server.server_close()


@contextlib.contextmanager
def contract_server(spec, can=('prompt_logprobs', 'sglang', 'echo', 'ids', 'chat', 'prefill'), shift=0, most=20, listing=None):
    "A model that speaks the contracts of servers that are not here, with its own true numbers; `shift` makes them wrong by so many rows."
    import torch
    from opd_nb.models.lm import LM
    lm, lock, seen = LM.load(spec, dtype='float32', device='cpu'), threading.Lock(), []
    tok = lm.codec.tok

    def rows(ids):
        with lock, torch.no_grad(): return lm.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    def spelled(i): return tok.decode([i])
    def listed(row, k): return [(i, row[i].item()) for i in row.topk(k).indices.tolist()] if k else []
    def entry(i, lp): return dict(token=spelled(i), bytes=list(lm.codec.bytes.table[i] or spelled(i).encode()), logprob=lp)
    def sample(logp, temperature):
        with lock: return int(logp.argmax()) if not temperature else int(torch.multinomial((logp / temperature).softmax(-1), 1, generator=torch.Generator().manual_seed(0)))
    def write(ids, n, temperature):
        out = []
        while len(out) < n and (not out or out[-1][0] not in lm.codec.stop_ids):
            logp = rows(ids + [i for i, _ in out])[-1]
            out.append((sample(logp, temperature), logp))
        return out

    class Serve(Handler):
        def do_GET(self): self.send(200, dict(data=[listing or dict(id='teacher', root=lm.path)]))
        def do_POST(self):
            body = json.loads(self.body()); seen.append((self.path, body))
            code, answer = getattr(self, self.path.strip('/').replace('/', '_').replace('v1_', ''), lambda b: (404, dict(error=dict(message='no such path'))))(body)
            self.send(code, answer)
        def completions(self, b):
            if isinstance(b['prompt'], list) and 'ids' not in can: return 500, dict(error=dict(message='prompt must be a string'))
            ids = b['prompt'] if isinstance(b['prompt'], list) else tok(b['prompt'], add_special_tokens=False)['input_ids']
            k, kp = b.get('logprobs') or 0, b.get('prompt_logprobs')
            if max(k, kp or 0) > most: return 400, dict(error=dict(message=f'at most {most} logprobs'))
            logp = rows(ids); last = write(ids, 1, b.get('temperature', 1))
            at = lambda t: logp[min(max(t - 1 + shift, 0), len(ids) - 1)]
            choice = dict(index=0, text=spelled(last[0][0]), logprobs=None)
            if kp is not None and 'prompt_logprobs' in can:
                choice['prompt_logprobs'] = [None] + [{str(i): dict(logprob=lp, rank=r + 1, decoded_token=spelled(i)) for r, (i, lp) in enumerate(listed(at(t), kp))}
                                                      | {str(ids[t]): dict(logprob=at(t)[ids[t]].item(), rank=int((at(t) > at(t)[ids[t]]).sum()) + 1, decoded_token=spelled(ids[t]))} for t in range(1, len(ids))]
            if 'logprobs' in b:
                t_, l_ = last[0]; echo = b.get('echo') and 'echo' in can
                told = [(i, at(t)) for t, i in enumerate(ids)] if echo else []
                choice['logprobs'] = dict(tokens=[spelled(i) for i, _ in told + [(t_, l_)]], token_logprobs=[None if echo and n == 0 else l[i].item() for n, (i, l) in enumerate(told + [(t_, l_)])],
                                          top_logprobs=[None if echo and n == 0 else {spelled(i): lp for i, lp in reversed(listed(l, k))} for n, (_, l) in enumerate(told + [(t_, l_)])])
            return 200, dict(choices=[choice], usage=dict(prompt_tokens=len(ids), completion_tokens=1))
        def generate(self, b):
            if 'sglang' not in can: return 404, {}
            ids, start = b['input_ids'], b['logprob_start_len']; logp = rows(ids)
            at = lambda t: logp[min(max(t - 1 + shift, 0), len(ids) - 1)]
            meta = dict(input_token_logprobs=[[None if t == start else at(t)[ids[t]].item(), ids[t], None] for t in range(start, len(ids))],
                        input_top_logprobs=[None if t == start else [[lp, i, None] for i, lp in listed(at(t), b['top_logprobs_num'])] for t in range(start, len(ids))])
            return 200, dict(text='', meta_info=meta | dict(prompt_tokens=len(ids), completion_tokens=1))
        def chat_completions(self, b):
            if 'chat' not in can: return 404, {}
            if (b.get('top_logprobs') or 0) > most: return 400, dict(error=dict(message=f'at most {most} top_logprobs'))
            m = b['messages']; prefix = m[-1]['content'] if m[-1]['role'] == 'assistant' else ''
            ids = lm.codec.prompt(m[:-1]) + list(lm.codec.write(prefix.encode(), False)[0]) if prefix and 'prefill' in can else lm.codec.prompt(m)
            out = write(ids, b.get('max_tokens', 16), b.get('temperature', 1))
            data, _, stopped = lm.codec.read([i for i, _ in out])
            told = dict(content=[entry(i, l[i].item()) | dict(top_logprobs=[entry(j, lp) for j, lp in listed(l, b.get('top_logprobs') or 0)]) for i, l in out]) if b.get('logprobs') else None
            return 200, dict(choices=[dict(index=0, message=dict(role='assistant', content=data.decode(errors='replace')), finish_reason='stop' if stopped else 'length', logprobs=told)], usage=dict(prompt_tokens=len(ids), completion_tokens=len(out)))

    with http_server(Serve) as url: yield url + '/v1'


@contextlib.contextmanager
def fault_proxy(url, faults=(), only='', before=lambda: None):
    "A proxy before a real server. Each POST calls `before` and takes the next of `faults`, then all pass; those whose path does not end in `only` find nothing. Gives its address, the faults still to come and the requests seen."
    import socket, struct, time, urllib.error, urllib.request
    root, faults, seen = url.removesuffix('/v1'), list(faults), []

    class Proxy(Handler):
        def forward(self, body=None):
            headers = {k: v for k, v in self.headers.items() if k.lower() in ('content-type', 'authorization')}
            try:
                with urllib.request.urlopen(urllib.request.Request(root + self.path, body, headers), timeout=60) as r: return r.status, r.read()
            except urllib.error.HTTPError as e: return e.code, e.read()
        def do_GET(self): self.send(*self.forward())
        def do_POST(self):
            body = self.body(); seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, json.loads(body)))
            fault = faults.pop(0) if faults else None
            before()
            if not self.path.endswith(only): return self.send(404, dict(error=dict(message='no such path')))
            quoted = f"{self.headers.get('Authorization')} {body.decode()}"
            if fault == 'busy': return self.send(429, dict(error=dict(message='slow down')), Retry_After=.1)
            if fault == 'broken': return self.send(500, dict(error=dict(message='oops')))
            if fault == 'expired': return self.send(401, dict(error=dict(message=f'this key has expired: {quoted}')))
            if fault == 'no model': return self.send(404, dict(error=dict(message='the model does not exist')))
            if fault == 'too long': return self.send(400, dict(error=dict(message='longer than the context')))
            if fault == 'hang': time.sleep(1.5); self.close_connection = True; return
            if fault == 'reset':
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); self.close_connection = True
                self.connection.close(); return
            try: code, answer = self.forward(body)
            except OSError: self.close_connection = True; return  # nobody is there any more
            if fault == 'unlisted': answer = json.dumps(json.loads(answer) | dict(choices=[dict(text='')])).encode()  # an end was drawn
            if fault == 'cut': answer = answer[:len(answer) // 2]
            if fault == 'short': answer = json.dumps(json.loads(answer)[:-1]).encode() if answer[:1] == b'[' else b'{}'
            if fault == 'slow': time.sleep(.3)
            self.send(code, answer)
        def finish(self):
            with contextlib.suppress(OSError): super().finish()

    with http_server(Proxy) as here: yield here + '/v1', faults, seen


class StoreSender:
    "What takes the place of NCCL where there is no GPU: this process is rank 0 of a key-value store of torch, and each tensor is a value in it."
    @staticmethod
    def check(device): pass
    def __init__(self, init_info, device):
        self.store, self.rounds = store_of(init_info, is_master=True), 0
    def __call__(self, weights):
        import torch
        self.rounds += 1
        for i, (_, tensor) in enumerate(weights): self.store.set(f'{self.rounds} {i}', tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def store_of(info, is_master):
    "The store of a group; it is there when all have come."
    from datetime import timedelta
    from torch.distributed import TCPStore
    return TCPStore(info['master_address'], info['master_port'], info['world_size'], is_master, timeout=timedelta(seconds=5), wait_for_workers=True)


class Receiver:
    "The worker of a server that takes weights, as strict as vLLM's: nothing before its time, no field that is not documented, no tensor of another size than was announced."
    def __init__(self, model): self.model, self.store, self.rounds, self.came = model, None, 0, None
    def init(self, info):
        need = {'master_address', 'master_port', 'rank_offset', 'world_size'}
        assert need <= set(info) <= need | {'packed', 'packed_buffer_size_bytes', 'packed_num_buffers'} and info['rank_offset'] == 1 and info['world_size'] == 2, info
        self.store, self.rounds = store_of(info, is_master=False), 0
    def start(self): self.came = {}
    def update(self, info):
        import torch
        assert self.store is not None and self.came is not None, 'no group, or no update that was started'
        assert set(info) == {'names', 'dtype_names', 'shapes'} and len({*map(len, info.values())}) == 1, set(info)
        has = dict(self.model.named_parameters())
        unknown = [name for name in info['names'] if name not in has]
        assert not unknown, f'no parameter {unknown[0]}'
        self.rounds += 1
        for i, (name, dtype, shape) in enumerate(zip(*(info[k] for k in ('names', 'dtype_names', 'shapes')))):
            data = torch.frombuffer(bytearray(self.store.get(f'{self.rounds} {i}')), dtype=getattr(torch, dtype))
            self.came[name] = data.view(shape)
    def finish(self):
        import torch
        has = dict(self.model.named_parameters())
        assert set(self.came) == set(has), 'a layer is not complete'
        with torch.no_grad():
            for name, tensor in self.came.items(): has[name].copy_(tensor)
        self.came = None


@contextlib.contextmanager
def writing_server(spec, transfer=False, together=False):
    "vLLM's contract for rollouts, kept by a model of ours: it continues token ids, says how likely each was, and takes adapters and weights from folders, with `transfer` also from a group. `deaf` says yes to them and keeps what it has; `gate` is called before a completion; with `together` those that wait are written as one batch, which is faster, and exact to rounding only."
    import copy
    import torch
    from types import SimpleNamespace
    from opd_nb.models.lm import LM, read
    from opd_nb.models.writing import write
    from opd_nb.training.rollouts import KeyedSampler, uniforms
    lm = LM.load(spec, dtype='float32', device='cpu')
    state, lock, receiver = SimpleNamespace(models={'base': lm.model}, version='default', deaf=False, paused=False, seen=[], gate=lambda body: None), threading.Lock(), Receiver(lm.model)
    waiting = []

    class Serve(Handler):
        def do_GET(self):
            path = self.path.partition('?')[0]
            if path == '/weight_info': return self.send(200, dict(weight_version=state.version))
            if path == '/get_world_size': return self.send(200, dict(world_size=1))
            if path == '/server_info': return self.send(200, dict(vllm_config=dict(weight_transfer_config=dict(backend='nccl') if transfer else None)))
            self.send(200, dict(data=[dict(id=name, parent=None if name == 'base' else 'base') for name in state.models]))
        def do_POST(self):
            b = json.loads(self.body()); state.seen.append((self.path, b))
            what = self.path.partition('?')[0].rpartition('/')[2]
            if what == 'completions':
                state.gate(b)
                b = SimpleNamespace(body=b, answer=None)
                waiting.append(b)
            with lock:
                try: code, answer = getattr(self, what)(b)
                except (AssertionError, RuntimeError) as e: code, answer = 500, dict(error=dict(message=str(e)))
                self.send(code, answer)
        def completions(self, job):
            assert not state.paused, 'paused'
            b = job.body
            if b['model'] not in state.models: return 404, dict(error=dict(message=f"The model `{b['model']}` does not exist."))
            if job.answer is None:
                like = ('model', 'max_tokens', 'temperature', 'top_p')
                jobs = [j for j in waiting if all(j.body[k] == b[k] for k in like)] if together else [job]
                waiting[:] = [j for j in waiting if j not in jobs]
                mine, prompts = LM(state.models[b['model']].eval(), lm.codec, lm.path), [j.body['prompt'] for j in jobs]
                numbers = torch.cat([uniforms(j.body['seed'], 0, [0], b['max_tokens']) for j in jobs])
                written = write(mine, prompts, b['max_tokens'], KeyedSampler(numbers, b['temperature'], b['top_p']))
                side = read(mine.model, prompts, written)
                told = side.logits(slice(None)).log_softmax(-1).gather(1, side.ids[:, None])[:, 0]
                for j, ids, logprobs in zip(jobs, written, told.split([len(ids) for ids in written])): j.answer = ids, logprobs.tolist()
            ids, logprobs = job.answer
            return 200, dict(choices=[dict(token_ids=ids, logprobs=dict(token_logprobs=logprobs), finish_reason='stop')], usage=dict(prompt_tokens=len(b['prompt']), completion_tokens=len(ids)))
        def load_lora_adapter(self, b):
            from peft import PeftModel
            base = copy.deepcopy(state.models['base'])
            state.models[b['lora_name']] = base if state.deaf else PeftModel.from_pretrained(base, b['lora_path'])
            return 200, 'Success'
        def unload_lora_adapter(self, b): state.models.pop(b['lora_name']); return 200, 'Success'
        def collective_rpc(self, b):
            from transformers import AutoModelForCausalLM
            if not state.deaf: state.models['base'].load_state_dict(AutoModelForCausalLM.from_pretrained(b['kwargs']['weights_path'], dtype='float32').state_dict())
            return 200, dict(results=[None])
        def update_weight_version(self, b): state.version = b['new_version']; return 200, dict(success=True)
        def pause(self, b): state.paused = True; return 200, dict(status='paused')
        def resume(self, b): state.paused = False; return 200, dict(status='resumed')
        def init_weight_transfer_engine(self, b):
            assert transfer, 'no weight transfer engine'
            receiver.init(b['init_info']); return 200, dict(message='Weight transfer initialized')
        def start_weight_update(self, b): receiver.start(); return 200, dict(message='Weight update started')
        def update_weights(self, b): receiver.update(b['update_info']); return 200, dict(message='Weights updated')
        def finish_weight_update(self, b):
            receiver.came = receiver.came if not state.deaf else dict(receiver.model.named_parameters())
            receiver.finish(); return 200, dict(message='Weight update finished')

    with http_server(Serve) as url: yield url, state
