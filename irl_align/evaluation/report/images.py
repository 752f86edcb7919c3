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

# A figure in a page takes the colours of the page, light or dark, which page.css sets.
VARIABLES = {TEXT: "text", QUIET: "quiet", RULE: "rule", PAGE: "page"}
DROPPED = {
    "metadata",
    "style",
    "clipPath",
}  # nothing is drawn outside the axes, so no clipping is needed
NAMESPACE = "http://www.w3.org/2000/svg"
PNG_DPI = 200


def svg(figure: Drawable, alone: bool = False) -> str:
    """The figure as an SVG element in the colours of its page; alone: as an SVG file."""
    with _drawn(figure) as drawing:
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        FigureCanvasSVG(drawing.figure).print_svg(file, metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    _without_namespaces(root)
    _add_tooltips(root, drawing.tooltips)
    _tidy(root)
    # These replace the style element, which would apply to the whole page.
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
    """The figure as a PNG file on a light background."""
    with _drawn(figure) as drawing:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        file = io.BytesIO()
        drawing.figure.set_dpi(PNG_DPI)
        FigureCanvasAgg(drawing.figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


@contextmanager
def _drawn(figure: Drawable) -> Iterator[Drawing]:
    with style(figure.key), warnings.catch_warnings():
        # The font lacks some scripts, such as Chinese; the viewer of an SVG has its own fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield draw(figure)


def _without_namespaces(root: ElementTree.Element) -> None:
    """Use the names of HTML: `svg`, not `{http://...}svg`, and `href`, not `xlink:href`."""
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(name): value for name, value in element.attrib.items()}


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _add_tooltips(root: ElementTree.Element, tooltips: dict[str, list[str]]) -> None:
    """Give each mark the text that a browser shows as a tooltip."""
    groups = {element.get("id"): element for element in root.iter("g")}
    for gid, texts in tooltips.items():
        group = groups.get(gid)
        if group is None:  # a series without points
            continue
        marks = group.findall(".//use") or group.findall("path")
        for mark, text in zip(marks, texts, strict=True):
            ElementTree.SubElement(mark, "title").text = clean(text)


def _tidy(root: ElementTree.Element) -> None:
    """Remove empty groups, unused ids, blanks and clipping."""
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
        if "style" in element.attrib:  # the font is set once
            element.set("style", re.sub(r"font-family:[^;]*; ", "", element.attrib["style"]))


def _follow_page(root: ElementTree.Element) -> None:
    for element in root.iter():
        style = element.get("style")
        if style:
            for colour, name in VARIABLES.items():
                style = style.replace(colour, f"var(--{name}, {colour})")
            element.set("style", style)
