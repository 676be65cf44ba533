# `make demo` and `make test` set up .venv by themselves. `make help` lists the rest.
PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3 python,$(shell command -v $(p) >/dev/null 2>&1 && $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo real test test-slow lab docs readme models clean help
.DEFAULT_GOAL := help

help:            ## this list
	@grep -hE '^[a-z-]+: .*## |^[a-z-]+:.*## ' Makefile | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "make %-10s %s\n", $$1, $$2}'

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "opd_nb needs Python 3.11 or later, and none was found. Install one, or name it: make demo PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "opd_nb needs Python 3.11 or later, but $(PYTHON) is %d.%d. Name a newer one: make demo PYTHON=/path/to/python3.11" % v[:2] or 0)'
	@echo "Setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python -m venv failed; on Debian and Ubuntu install python3-venv."; exit 1; }

$(VENV)/.base: settings.ini setup.py constraints.txt | $(BIN)/python
	@echo "Installing opd_nb and what it needs (a few minutes the first time)"
	@$(PIP) -e . && touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "Installing what the tests and JupyterLab need (the first time llama.cpp is compiled, 5 to 10 minutes on two cores; pip keeps the result)"
	@$(PIP) -e '.[dev]' && touch $@

$(VENV)/.gguf: $(VENV)/.base
	@echo "Installing llama.cpp (the first time it is compiled, 5 to 10 minutes on two cores; pip keeps the result)"
	@$(PIP) -e '.[gguf]' && touch $@

$(VENV)/.lab: $(VENV)/.base
	@echo "Installing JupyterLab"
	@$(PIP) -e '.[lab]' && touch $@

demo: $(VENV)/.base  ## distil across tokenizers, offline, and show the rise
	@HF_HUB_OFFLINE=1 $(BIN)/opd demo --output-dir outputs/quickstart $(ARGS)

real: $(VENV)/.gguf  ## the same with two real language models: 350 MB to fetch, ten to twenty minutes
	@$(BIN)/opd real --output-dir outputs/real $(ARGS)

test: $(VENV)/.dev   ## every notebook and every test
	@PATH="$(abspath $(BIN)):$$PATH" sh .ci/test

test-slow: $(VENV)/.dev  ## the tests that take minutes each; the last lines say which ran
	@PATH="$(abspath $(BIN)):$$PATH" OPD_SLOW=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 MPLBACKEND=agg JUPYTER_PLATFORM_DIRS=1 python -m pytest tests -n 2 --dist loadfile -m slow

lab: $(VENV)/.lab    ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab nbs/

docs: $(VENV)/.dev   ## every notebook as HTML, in _docs
	@$(BIN)/python .ci/render.py html _docs

readme: $(VENV)/.dev ## README.md and .env.example from their notebooks
	@$(BIN)/python .ci/render.py readme README.md
	@$(BIN)/python -c 'from opd_nb.core.config import env_example; open(".env.example", "w", encoding="utf-8").write(env_example())'

models: $(VENV)/.base ## train the embedded models anew, into outputs/tiny (about an hour)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m papermill nbs/runs/tiny_models.ipynb outputs/tiny_models.ipynb

clean:           ## remove the environment and all outputs
	rm -rf $(VENV) outputs _docs build *.egg-info
