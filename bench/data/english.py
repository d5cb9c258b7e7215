"""Real English prose that ships with every Python installation: the language reference.

The pages of `pydoc_data.topics` are split into train and test by a hash of the page name, so a page
stays in its split whatever a Python version adds, drops or rewords.
"""

import hashlib
from functools import cache
from pydoc_data.topics import topics

_BUCKETS = 5


def is_test_page(name: str) -> bool:
    """Tell whether the page called `name` is in the test split (about one page in five)."""
    # SHA-256, because `hash` of a string differs from process to process (PYTHONHASHSEED).
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % _BUCKETS == 0


@cache
def train_text() -> str:
    """Return all pages for training and calibration, sorted by name."""
    return _join(test=False)


@cache
def test_text() -> str:
    """Return all pages that perplexity is measured on, sorted by name."""
    return _join(test=True)


def fingerprint() -> str:
    """Return the SHA-256 of the test text; it differs between Python versions."""
    return hashlib.sha256(test_text().encode()).hexdigest()


def _join(*, test: bool) -> str:
    train = {text.strip() for name, text in topics.items() if not is_test_page(name)}
    pages = (topics[name].strip() for name in sorted(topics) if is_test_page(name) == test)
    # A few topics are aliases of one page, and their names may hash to both splits: such a page is
    # a training page only, or the test text would contain training text.
    return "\n\n".join(dict.fromkeys(p for p in pages if not test or p not in train))
