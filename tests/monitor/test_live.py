"A live plot in a real kernel: one picture in the end, the last one, and no widget state."
import nbformat
from nbclient import NotebookClient

CELL = '''
from opd_nb.monitor.curves import LivePlot
events = []
live = LivePlot(events, every=5, metrics=('loss',))
for i in range(1, 21):
    events.append(dict(event='step', step=i, loss=float(i)))
    live(events[-1])
    if i == 5: first = live.handle
assert live.handle is first
'''


def test_one_picture_is_left():
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL), nbformat.v4.new_code_cell(CELL.replace('range(1, 21)', 'range(1, 6)'))])
    NotebookClient(nb, timeout=120, kernel_name='python3').execute()
    (long,), (short,) = (c.outputs for c in nb.cells)
    assert set(long.data) == {'image/png', 'text/plain'} and long.data['image/png'] != short.data['image/png']
    assert 'widgets' not in nb.metadata
