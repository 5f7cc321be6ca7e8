"""Records as sentences, written from the declaration: real ones, and synthetic ones that are public constants."""

from collections.abc import Iterable

import numpy as np

from fedmed.task import ColumnConfig, TableTaskConfig

# How often a column of a synthetic record is blank, where a blank has a phrase.
SYNTHETIC_BLANKS = 0.15


def sentence(task: TableTaskConfig, phrases: Iterable[str]) -> str:
    """A record's phrases, joined as the task declares; empty ones are left out."""
    return task.separator.join(filter(None, phrases)) + "."


def numeric_phrase(name: str, column: ColumnConfig, value: float) -> str:
    """What a number says in words."""
    place = int(np.searchsorted(column.cutoffs, value, side="right"))
    word = column.cutoff_words[place] if column.cutoff_words else ""
    return _template(name, column).format(value=f"{value:.{column.decimals}f}", word=word)


def category_phrase(name: str, column: ColumnConfig, category: str) -> str:
    """What a category says in words."""
    return column.words.get(category, _template(name, column).format(value=category, word=category))


def _template(name: str, column: ColumnConfig) -> str:
    """The column's phrase; a brace in a column's name is only a brace."""
    return column.phrase or name.replace("{", "{{").replace("}", "}}") + " {value}"


def bounds(column: ColumnConfig) -> tuple[float, float]:
    """A numeric column's declared range."""
    # For the type checker: a numeric ColumnConfig without both does not come into being.
    assert column.low is not None
    assert column.high is not None
    return column.low, column.high


def synthetic_sentences(task: TableTaskConfig, count: int) -> list[str]:
    """Sentences drawn from the declaration alone: a public constant, the same at every site.

    Each column is drawn uniformly from its range or categories; one that declares a phrase for blanks is
    blank with probability `SYNTHETIC_BLANKS`.
    """
    draws = np.random.default_rng(0)
    sentences = []
    for _ in range(count):
        words = []
        for name, column in task.columns.items():
            blank = draws.random() < SYNTHETIC_BLANKS
            if column.kind == "numeric":
                words.append(numeric_phrase(name, column, draws.uniform(*bounds(column))))
            else:
                category = column.categories[int(draws.integers(len(column.categories)))]
                words.append(category_phrase(name, column, category))
            if blank and column.blank:
                words[-1] = column.blank
        sentences.append(sentence(task, words))
    return sentences
