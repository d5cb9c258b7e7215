"""Data inside a page are the same data afterwards, and nothing in them can end a script."""

import base64
import gzip
import hashlib
import json
import math

from hypothesis import given
from hypothesis import strategies as st

from bench.reporting.html.page import gzip_base64, json_text, security_policy

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(plain)
def test_json_comes_back_and_has_no_sign_of_markup(value):
    text = json_text(value)
    assert json.loads(text) == value
    assert not set("<>&'\u2028\u2029") & set(text)


@given(plain)
def test_a_packed_value_comes_back(value):
    text = gzip_base64(value)
    assert json.loads(gzip.decompress(base64.b64decode(text))) == value
    assert not set("<>&'\"") & set(text)


def test_the_end_of_a_script_is_escaped():
    text = json_text({"a": "</script><!--\u2028"})
    assert text == '{"a":"\\u003c/script\\u003e\\u003c!--\\u2028"}'


def test_what_json_cannot_say_is_null():
    assert json_text([math.nan, math.inf, {"a": -math.inf}]) == '[null,null,{"a":null}]'


def test_a_lone_surrogate_does_not_break_the_page():
    assert json.loads(gzip.decompress(base64.b64decode(gzip_base64("a\ud800")))) == "a?"


def test_the_policy_allows_these_scripts_by_hash_and_no_network():
    digest = base64.b64encode(hashlib.sha256(b"let a = 1;").digest()).decode()
    rules = dict(rule.split(" ", 1) for rule in security_policy(["let a = 1;"]).split("; "))
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert "http" not in security_policy(["let a = 1;"])
