"""The slides: whether the page is current, fetches nothing, and says clearly what is missing."""

import base64
import re
import shutil
import subprocess

import pytest

from show import slides

SVG = '<svg xmlns="http://www.w3.org/2000/svg"><title>T</title><desc id="d">A line.</desc></svg>'
HEAD = "# Title\n\nText.\n\n## Second\n\n"


def written():
    return slides.PAGE.read_text(encoding="utf-8")


def sections(page):
    return re.findall(r"<section.*?</section>", page, re.S)


def pictures(page):
    found = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    return [base64.b64decode(data).decode() for data in found]


def test_the_page_is_what_the_source_and_the_figures_give():
    source = slides.SOURCE.read_text(encoding="utf-8")
    assert slides.page(source, slides.DOCS) == written(), "run python -m show.slides"


def test_every_slide_has_one_heading_and_few_lines():
    assert 18 <= len(sections(written())) <= 26
    for section in sections(written()):
        assert len(re.findall(r"<h[12]>.+?</h[12]>", section)) == 1, section
    source = slides.SOURCE.read_text(encoding="utf-8")
    for slide in re.split(r"^#+ .*$", source, flags=re.M)[1:]:
        assert len([line for line in slide.splitlines() if line.strip("` ")]) <= 12, slide


def test_nothing_is_fetched():
    page = written()
    for text in (page, *pictures(page)):
        own = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//\w|@import|url\(|<link|<iframe", own)
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert all(source.startswith(("data:", "../")) or source == "reading.md" for source in sources)


def test_every_picture_is_there_and_told_in_words():
    page = written()
    named = re.findall(r"!\[\]\((.+)\)", slides.SOURCE.read_text(encoding="utf-8"))
    assert len(named) == len(pictures(page)) == len(re.findall(r'<img alt="[^"]{20,}"', page))


def test_what_the_source_may_hold(tmp_path):
    (tmp_path / "a.svg").write_text(SVG)
    body = "A <b> & `x < 1`, **bold**,\n[a link](b.md).\n\n- one\n  goes on\n- two\n\n![](a.svg)\n"
    first, second = sections(slides.page(HEAD + body + "```\n# no slide\n```\n", tmp_path))
    assert first == '<section id="1">\n<h1>Title</h1>\n<p>Text.</p>\n</section>'
    text = "A &lt;b&gt; &amp; <code>x &lt; 1</code>, <b>bold</b>, "
    assert f'<p>{text}<a href="b.md">a link</a>.</p>' in second
    assert "<ul><li>one goes on</li><li>two</li></ul>" in second
    assert '<img alt="A line." src="data:' in second and "<pre># no slide</pre>" in second


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("text\n", "slides.md begins without a heading: 'text'"),
        ("", "slides.md has no slide"),
        (HEAD + "![](none.svg)", r"there is no .*none.svg: draw it with python -m show.figure"),
        (HEAD + "![words](a.svg)", "a figure is a line of its own"),
        (HEAD + "![](untold.svg)", "untold.svg has no <desc>"),
    ],
)
def test_what_is_wrong_is_said(source, complaint, tmp_path):
    (tmp_path / "untold.svg").write_text("<svg></svg>")
    with pytest.raises(ValueError, match=complaint):
        slides.page(source, tmp_path)


@pytest.mark.slow
def test_it_prints_one_slide_a_page(tmp_path):
    browser = shutil.which("chromium")
    if not browser:
        pytest.skip("there is no chromium here to print the slides")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --no-pdf-header-footer"
    out = tmp_path / "slides.pdf"
    more = [f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={out}"]
    command = [browser, *flags.split(), *more, slides.PAGE.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pages = re.findall(rb"/Type\s*/Page\b", out.read_bytes())
    assert len(pages) == len(sections(written()))


def test_a_missing_figure_ends_the_command_with_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "slides.md").write_text(HEAD + "![](none.svg)")
    monkeypatch.setattr(slides, "DOCS", tmp_path)
    monkeypatch.setattr(slides, "SOURCE", tmp_path / "slides.md")
    monkeypatch.setattr(slides, "PAGE", tmp_path / "slides.html")
    assert slides.main() == 2
    assert capsys.readouterr().err.count("\n") == 1 and not slides.PAGE.exists()
