"""One file of everything that was learnt, for programs without featcache: ONNX, OpenVINO."""
