"""What the README shows runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_python_snippet_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "out" / "config.json").is_file()
    assert capsys.readouterr().out.startswith("plan ")


def test_every_link_of_the_readme_points_at_a_file():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text())
    missing = [target for target in targets if not (README.parent / target).exists()]
    assert targets
    assert missing == []
