"""Classify one image with a shipped head: python classify.py model.onnx image.ppm."""

import json
import sys

import numpy as np
import onnxruntime

model, path = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

# Any decoder will do: what counts is upright RGB, uint8 (1, height, width, 3).
with open(path, "rb") as file:
    kind, width, height, _, pixels = file.read().split(maxsplit=4)
    if kind != b"P6":
        sys.exit(f"{path}: expected a PPM image, P6; convert it first")
image = np.frombuffer(pixels, np.uint8).reshape(1, int(height), int(width), 3)

probabilities, features = session.run(["probabilities", "features"], {"image": image})
names = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
for name, probability in zip(names, probabilities[0], strict=True):
    print(name, f"{probability:.6f}")
