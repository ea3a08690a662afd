"""README and licence stand at the top of the repository, where mkdocs does not look: it gets them from here."""
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
TOP = {'README.md': 'index.md', 'README.zh.md': 'index.zh.md', 'CHANGELOG.md': 'changelog.md'}


def on_files(files, config):
    for source, name in TOP.items():
        text = (ROOT / source).read_text(encoding='utf-8').replace('](docs/', '](')
        files.append(File.generated(config, name, content=text))
    files.append(File.generated(config, 'LICENSE', content=(ROOT / 'LICENSE').read_text(encoding='utf-8')))
    return files


def on_page_markdown(markdown, page, config, files):
    for source, name in TOP.items():
        markdown = re.sub(rf'\]\((\.\./)?{re.escape(source)}\b', f']({name}', markdown)
    return markdown
