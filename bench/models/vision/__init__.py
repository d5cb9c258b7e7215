"""Image classifiers: the networks of the WGSEF experiments, and small versions of them."""

from bench.models.vision.build import ARCHITECTURES, build
from bench.models.vision.classifier import Classifier, VisionConfig
from bench.models.vision.folder import load, save
from bench.models.vision.onnx import to_onnx

__all__ = ["ARCHITECTURES", "Classifier", "VisionConfig", "build", "load", "save", "to_onnx"]
