"""Calibration of methods for experts: what every one of them refuses."""

import pytest

from bench.errors import UserError
from methods.baselines.d2_moe.method import D2Moe
from methods.baselines.expert_scores import Reap
from methods.baselines.micro_expert_controls import ActivationOnly
from methods.baselines.naee import Naee
from methods.camera.loss_aware import CameraLossAware
from methods.camera.pruning import CameraP
from tests.methods.method_application import applied
from tests.methods.quantization.quantized_networks import METHODS
from tests.models.tiny_networks import build

CALIBRATED = [
    *(kind(ratio=0.4) for kind in (ActivationOnly, CameraLossAware, CameraP, D2Moe, Naee, Reap)),
    *(method for name, method in METHODS.items() if name != "rtn"),
]


@pytest.mark.parametrize("method", CALIBRATED, ids=lambda method: type(method).__name__)
def test_activations_that_are_not_numbers_are_refused(method):
    network = build("mixtral")
    network.model.embed_tokens.weight[5] = float("inf")
    with pytest.raises(UserError, match=r"activations of model\.layers\.0\.mlp"):
        applied(method, network)
