"""A text box for notebooks: type a sentence and see its translation or its attention."""

from collections.abc import Callable

import ipywidgets

from config import InputError
from translate import Translator


def sentence_box(translator: Translator, sentence: str, show: Callable[[str], object]) -> ipywidgets.VBox:
    """A text box and, below it, what `show` returns for its sentence, a string or a chart; Enter updates it.

    Words that are not in the vocabulary are listed. Text is in a text area and a chart is a PNG, so nothing that is
    typed becomes HTML. (An Output widget would show a chart as cells do, but nbclient sometimes hangs with one.)
    """
    wide = {"width": "min(100%, 700px)"}
    text = ipywidgets.Text(
        sentence, placeholder="Type a sentence and press Enter", continuous_update=False, layout=wide
    )
    answer = ipywidgets.Textarea(disabled=True, rows=2, layout=wide)
    picture = ipywidgets.Image(format="png", layout={"align_self": "flex-start"})  # in its own size

    def update(_change: dict | None = None) -> None:
        unknown, png = [], b""
        try:
            unknown = translator.unknown_words(text.value)
            shown = show(text.value)
        except InputError as error:
            shown = str(error)
        if not isinstance(shown, str):
            from interpret.charts import small_png  # the packages of requirements-charts.txt

            shown, png = "", small_png(shown.to_dict())
        if unknown:
            shown = f"not in the vocabulary of this run: {', '.join(unknown)}\n{shown}"
        answer.value, picture.value = shown, png
        for part in (answer, picture):
            part.layout.display = None if part.value else "none"

    text.observe(update, "value")
    update()
    return ipywidgets.VBox([text, answer, picture])
