"""A text box for notebooks: type a sentence and see its translation or its attention."""

from collections.abc import Callable

import ipywidgets
from IPython.display import display

from config import InputError
from translate import Translator


def sentence_box(translator: Translator, sentence: str, show: Callable[[str], object]) -> ipywidgets.VBox:
    """A text box and, below it, what `show` returns for its sentence; Enter updates it. Unknown words are listed.

    A string is printed as plain text, so nothing that is typed becomes HTML; anything else is displayed as in a cell.
    """

    def update(sentence: str) -> None:
        try:
            if unknown := translator.unknown_words(sentence):
                print(f"not in the vocabulary of this run: {', '.join(unknown)}")
            shown = show(sentence)
        except InputError as error:
            shown = str(error)
        print(shown) if isinstance(shown, str) else display(shown)

    layout = ipywidgets.Layout(width="min(100%, 700px)")
    text = ipywidgets.Text(
        sentence, continuous_update=False, placeholder="Type a sentence and press Enter", layout=layout
    )
    return ipywidgets.VBox([text, ipywidgets.interactive_output(update, {"sentence": text})])
