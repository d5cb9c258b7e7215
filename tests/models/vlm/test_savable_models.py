"""Which networks with images can be written to a folder."""

import pytest

from bench.errors import UserError
from bench.models.saving import refuse_unsavable
from methods.token_pruning.divprune import DivPrune
from methods.visual_tokens.strategies import LayerDrop
from tests.methods.token_pruning.recorded_steps import applied
from tests.methods.visual_engine.tiny_mllms import ARCHITECTURES, build


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_rebuilt_from_its_config(name):
    refuse_unsavable(build(name), None)


@pytest.mark.parametrize("method", [LayerDrop(layers=2), DivPrune(keep=5)])
def test_work_that_is_skipped_while_running_is_not_written(method):
    network, _ = applied("llava_llama", method)
    with pytest.raises(UserError, match=r"language_model is changed only while it runs"):
        refuse_unsavable(network, None)
