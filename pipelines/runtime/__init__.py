"""Other runtimes than torch for a pipeline's networks, on the processor: OpenVINO and onnxruntime."""
