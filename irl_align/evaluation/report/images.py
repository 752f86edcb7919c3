"""Drawn figures as SVG, in a page or as a file, and as PNG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from xml.etree import ElementTree

from irl_align.evaluation.report.drawing import PAGE, QUIET, RULE, TEXT, Drawing, clean, draw, style
from irl_align.evaluation.report.figures import Drawable

# In a page a figure takes the page's colours, light or dark; page.css sets them.
VARIABLES = {TEXT: "text", QUIET: "quiet", RULE: "rule", PAGE: "page"}
DROPPED = {"metadata", "style", "clipPath"}  # nothing is drawn outside the axes
NAMESPACE = "http://www.w3.org/2000/svg"
PNG_DPI = 200


def svg(figure: Drawable, alone: bool = False) -> str:
    """The figure as an SVG element of a page, whose colours it follows; `alone` as a file."""
    with _drawn(figure) as drawing:
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(drawing.figure).print_svg(file, metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    _without_namespaces(root)
    _tell(root, drawing.told)
    _tidy(root)
    # What the style element, which would reach the whole page, says.
    root.attrib |= {"role": "img", "class": "figure", "stroke-linejoin": "round"}
    if alone:
        root.attrib |= {"xmlns": NAMESPACE, "font-family": "'DejaVu Sans', sans-serif"}
    else:
        del root.attrib["width"], root.attrib["height"]
        _follow_page(root)
    title = ElementTree.Element("title")
    title.text = clean(figure.title)
    root.insert(0, title)
    return ElementTree.tostring(root, "unicode")


def png(figure: Drawable) -> bytes:
    """The figure as a PNG file, light."""
    with _drawn(figure) as drawing:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        file = io.BytesIO()
        drawing.figure.set_dpi(PNG_DPI)
        FigureCanvasAgg(drawing.figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


@contextmanager
def _drawn(figure: Drawable) -> Iterator[Drawing]:
    with style(figure.key), warnings.catch_warnings():
        # Its font has no Chinese, say; a reader of the SVG has a font that does.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield draw(figure)


def _without_namespaces(root: ElementTree.Element) -> None:
    """Names as HTML has them: `svg`, not `{http://...}svg`, and `href`, not `xlink:href`."""
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(name): value for name, value in element.attrib.items()}


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _tell(root: ElementTree.Element, told: dict[str, list[str]]) -> None:
    """Give each mark the text that a browser shows on moving over it."""
    groups = {element.get("id"): element for element in root.iter("g")}
    for gid, texts in told.items():
        group = groups.get(gid)
        if group is None:  # a series without points
            continue
        marks = group.findall(".//use") or group.findall("path")
        for mark, text in zip(marks, texts, strict=True):
            ElementTree.SubElement(mark, "title").text = clean(text)


def _tidy(root: ElementTree.Element) -> None:
    """Drop what says nothing: empty groups, ids that nothing refers to, blanks, clipping."""
    used = {element.get("href", "").removeprefix("#") for element in root.iter("use")}
    for element in root.iter():
        for child in list(element):
            child.tail = None
            if child.tag in DROPPED or (child.tag == "g" and not len(child)):
                element.remove(child)
        if element.text and not element.text.strip():
            element.text = None
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        element.attrib.pop("clip-path", None)
        if "style" in element.attrib:  # the font is said once
            element.set("style", re.sub(r"font-family:[^;]*; ", "", element.attrib["style"]))


def _follow_page(root: ElementTree.Element) -> None:
    for element in root.iter():
        said = element.get("style")
        if said:
            for colour, name in VARIABLES.items():
                said = said.replace(colour, f"var(--{name}, {colour})")
            element.set("style", said)
