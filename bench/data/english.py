"""Real English prose that every Python installation carries: the language reference.

The pages of ``pydoc_data.topics`` are split into train and test by a hash of the page's name,
so a page stays on its side whatever the Python version adds, drops or rewords.
"""

import hashlib
from functools import cache
from pydoc_data.topics import topics

_BUCKETS = 5


def is_test_page(name: str) -> bool:
    """Whether the page called ``name`` belongs to the test side (about one page in five)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % _BUCKETS == 0


@cache
def train_text() -> str:
    """All pages a model may be trained or calibrated on, in order of their names."""
    return _join(test=False)


@cache
def test_text() -> str:
    """All pages that perplexity is measured on, in order of their names."""
    return _join(test=True)


def fingerprint() -> str:
    """Return the SHA-256 of the test text, which differs between Python versions."""
    return hashlib.sha256(test_text().encode()).hexdigest()


def _join(*, test: bool) -> str:
    train = {text.strip() for name, text in topics.items() if not is_test_page(name)}
    pages = (topics[name].strip() for name in sorted(topics) if is_test_page(name) == test)
    # A few topics are aliases of one page: such a page is a training page only.
    return "\n\n".join(dict.fromkeys(p for p in pages if not test or p not in train))
