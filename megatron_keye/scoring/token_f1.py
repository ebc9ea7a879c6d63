# SPDX-License-Identifier: Apache-2.0
"""Token F1 of two texts: a measure of captions that needs no model.

It counts words that both texts have. It does not see their order, synonyms or negation, so it
tells apart models that describe from those that do not, and not which of two descriptions is the
better one.

Source: Rajpurkar et al., SQuAD (arXiv 1606.05250), section 6.1.
"""

import re
import unicodedata
from collections import Counter

_ARTICLES = {"a", "an", "the"}
# Scripts that put no spaces between words: Chinese characters, kana, Hangul is spaced.
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


def normal(text: str) -> str:
    """Return a text in lower case, with one spelling for characters of several."""
    return unicodedata.normalize("NFKC", text).lower()


def tokens(text: str) -> list[str]:
    """Return the words of a text in lower case without articles and punctuation.

    In scripts that put no spaces between words each character counts as one.
    """
    return [word for word in _TOKEN.findall(normal(text)) if word not in _ARTICLES]


def token_f1(answer: str, truth: str) -> float:
    """Return the harmonic mean of precision and recall of the answer's words.

    Args:
        answer: The model's text.
        truth: The text that it is compared with.

    Returns:
        0 to 1; 1 for the same words in any order, also for none on both sides.
    """
    of_answer, of_truth = Counter(tokens(answer)), Counter(tokens(truth))
    total = of_answer.total() + of_truth.total()
    return 2 * (of_answer & of_truth).total() / total if total else 1.0
