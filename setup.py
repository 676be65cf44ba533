"Reads settings.ini; needs nothing that is not in the standard library or setuptools."
from configparser import ConfigParser
from pathlib import Path
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).parent / 'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {k.removeprefix('extra_'): cfg[k].split() for k in cfg if k.startswith('extra_')}
extras['dev'] = cfg['dev_requirements'].split()


class WithNotebooks(build_py):
    "The run notebooks live in nbs/runs; a wheel carries them and what they read as opd_nb/run_notebooks, and the tested versions beside them."
    def run(self):
        super().run()
        target = Path(self.build_lib) / 'opd_nb' / 'run_notebooks'
        for nb in sorted((Path(__file__).parent / 'nbs' / 'runs').glob('*.ipynb')):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(nb, target)
        shutil.copytree(Path(__file__).parent / 'nbs' / 'runs' / 'results', target / 'results', dirs_exist_ok=True)
        shutil.copy(Path(__file__).parent / 'constraints.txt', target.parent)


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license='MIT', url=cfg['git_url'],
    long_description=(Path(__file__).parent / 'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=find_packages(include=['opd_nb*']), package_data={'opd_nb': ['py.typed', 'tiny/*/*', 'domains/*', 'presets/*', 'tasks/*', 'accelerate/*', 'texts/*']}, include_package_data=False,
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(), extras_require=extras,
    cmdclass={'build_py': WithNotebooks}, zip_safe=False,
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
