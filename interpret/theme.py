"""The design shared by charts, pages and the explorer: fonts, colors in light and dark, and the style of cards.

Marks name a role ("chosen", "read", "low", …) as their Vega style instead of a color, and the palette decides how the
role looks. A chart therefore needs no change for dark mode, only another configuration.
"""

from dataclasses import asdict, dataclass

import altair as alt

SANS = 'Inter, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
MONO = 'ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace'


@dataclass(frozen=True)
class Palette:
    page: str  # background of the page
    card: str  # background of cards and charts
    sunken: str  # controls, and tokens that are not selected
    line: str  # borders and grids
    text: str
    muted: str  # secondary text and axis labels
    read: str  # what is read: keys, the source
    written: str  # what is written: queries, the chosen token
    ribbon: str  # lines from query to key
    bar: str  # bars that are not highlighted
    good: str  # a change for the better
    weights: tuple[str, ...]  # color scale of weights, from 0 to 1
    change: tuple[str, ...]  # color scale of differences, from -1 to 1
    on_low: str  # numbers on cells of small weights
    on_high: str  # numbers on cells of large weights


LIGHT = Palette(
    page="#f4f5f7", card="#ffffff", sunken="#eef0f4", line="#e2e5ea", text="#171b22", muted="#5f6b7c",
    read="#2563c9", written="#c8402a", ribbon="#4b78d8", bar="#b9c2d0", good="#1b7f5c",
    weights=("#eaf0fa", "#a3c2f2", "#4274d6", "#2049a0", "#10265c"),
    change=("#a3271a", "#e08a7d", "#f0f2f5", "#78a5ea", "#1f4a9f"),
    on_low="#05080d", on_high="#ffffff",
)  # fmt: skip
DARK = Palette(
    page="#0d1015", card="#151a21", sunken="#1f2630", line="#2b333f", text="#e7ebf1", muted="#98a4b5",
    read="#7fb2ff", written="#ff8d70", ribbon="#5d97f5", bar="#46526399", good="#57c99b",
    weights=("#1d2530", "#214a82", "#3a78cf", "#98c7ff", "#e8f3ff"),
    change=("#ff8d7a", "#8c3c33", "#1f2630", "#2c5fae", "#8fc2ff"),
    on_low="#ffffff", on_high="#05080d",
)  # fmt: skip
PALETTES = {"light": LIGHT, "dark": DARK}


def vega_config(palette: Palette = LIGHT) -> dict:
    """The Vega-Lite configuration: fonts, axes, the scales `heatmap` and `diverging`, and the styles of roles."""
    labels = {"labelFont": SANS, "titleFont": SANS, "labelColor": palette.muted, "titleColor": palette.muted}
    plain = {**labels, "titleFontWeight": "normal", "labelFontSize": 12, "titleFontSize": 12}
    fills = {"read": palette.read, "written": palette.written, "chosen": palette.written, "bar": palette.bar}
    fills |= {"good": palette.good, "ribbon": palette.ribbon, "muted": palette.muted, "label": palette.text}
    fills |= {"low": palette.on_low, "high": palette.on_high, "token": palette.sunken}
    fills |= {"on_accent": palette.card, "empty": palette.weights[0]}
    return {
        "background": palette.card,
        "font": SANS,
        "view": {"stroke": None},
        "axis": {**plain, "gridColor": palette.line, "domainColor": palette.line, "tickColor": palette.line},
        "legend": {**plain, "gradientLength": 120, "gradientThickness": 8},
        "header": plain,
        "title": {
            "font": SANS, "fontSize": 14, "fontWeight": 600, "color": palette.text, "anchor": "start", "offset": 10,
            "subtitleFont": SANS, "subtitleFontSize": 12, "subtitleColor": palette.muted, "subtitlePadding": 4,
        },
        "text": {"font": SANS, "fontSize": 12, "color": palette.text},
        "bar": {"color": palette.bar},
        "range": {
            "heatmap": list(palette.weights), "ramp": list(palette.weights), "diverging": list(palette.change),
            "category": [palette.read, palette.written, palette.good, palette.muted],
        },
        "style": {
            **{name: {"color": color} for name, color in fills.items()},
            "frame": {"color": "transparent", "stroke": palette.written, "strokeWidth": 2.5},
            "outline": {"color": "transparent", "stroke": palette.line, "strokeWidth": 1},
            "line": {"color": palette.ribbon},
        },
    }  # fmt: skip


def css() -> str:
    """Style sheet of a page: the palettes as variables, chosen by the reader's preference or `data-theme` on <html>."""

    def variables(palette: Palette) -> str:
        return "".join(f"--{name}:{color};" for name, color in asdict(palette).items() if isinstance(color, str))

    scales = "".join(
        f"--ramp-{name}:linear-gradient(90deg,{','.join(palette.weights)});" for name, palette in PALETTES.items()
    )
    light = f"{variables(LIGHT)}--ramp:var(--ramp-light);color-scheme:light;"
    dark = f"{variables(DARK)}--ramp:var(--ramp-dark);color-scheme:dark;"
    return (
        f":root{{{scales}{light}}}\n:root[data-theme=dark]{{{dark}}}\n"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}\n" + STYLE
    )


STYLE = f"""
body {{ margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 {SANS}; }}
.card {{ background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 16px 18px; }}
.card h2 {{ margin: 0; font-size: 15px; font-weight: 600; }}
.card p {{ margin: 2px 0 10px; color: var(--muted); font-size: 13px; }}
"""


@alt.theme.register("light", enable=True)
def light() -> alt.theme.ThemeConfig:
    return alt.theme.ThemeConfig(config=vega_config(LIGHT))


@alt.theme.register("dark", enable=False)
def dark() -> alt.theme.ThemeConfig:
    return alt.theme.ThemeConfig(config=vega_config(DARK))
