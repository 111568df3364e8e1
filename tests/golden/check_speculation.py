"""onnx|twin FOLDER...: compares what a speculation model gave (FOLDER/cases/*.safetensors: a window
and its outputs) with FOLDER/onnx in onnxruntime or with the PyTorch twin. Exit status 1 where they
differ by more than 1e-5 of the largest output of a file, or where nothing was compared."""
import json
import pathlib
import sys

import numpy
from safetensors import safe_open

sys.dont_write_bytecode = True  # the source folder may not be ours to write to
TOLERANCE = 1e-5
OUTPUTS = ("logits_BTHE", "confidence_BTH")


def by_onnxruntime(folder):
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {}

    def run(stack, source, window):
        name = f"{stack}-{'before' if source < 0 else source}.onnx"
        if name not in sessions:
            sessions[name] = onnxruntime.InferenceSession(
                folder / "onnx" / name, options, providers=["CPUExecutionProvider"])
        inputs = {i.name: window[i.name] for i in sessions[name].get_inputs()}
        return sessions[name].run(OUTPUTS, inputs)
    return run


def by_twin(folder):
    import torch
    from speculation_twin import SpeculationTwin
    torch.set_num_threads(1)
    twin = SpeculationTwin(folder)

    def run(stack, source, window):
        tensors = {name: torch.from_numpy(value) for name, value in window.items()}
        return [out.numpy() for out in twin(stack, source, tensors)]
    return run


def check(folder, how):
    """The largest error of a folder's cases."""
    run = {"onnx": by_onnxruntime, "twin": by_twin}[how](folder)
    worst, compared = 0.0, 0
    for path in sorted((folder / "cases").glob("*.safetensors")):
        with safe_open(path, "np") as file:
            window = {name: file.get_tensor(name) for name in file.keys()}
            place = json.loads(file.metadata()["case"])
        expected = [window.pop(name) for name in OUTPUTS]
        real = window["valid_BT"]
        for name, want, got in zip(OUTPUTS, expected, run(**place, window=window)):
            if got.shape != want.shape or not numpy.isfinite(got).all():
                sys.exit(f"{path} {name}: {got.shape}, expected finite {want.shape}")
            error = numpy.abs(got - want)[real].max() / numpy.abs(want[real]).max()
            worst, compared = max(worst, float(error)), compared + 1
            if error > TOLERANCE:
                print(f"{path.name} {place} {name}: off by {error:.2e}")
    print(f"{folder.name}: {compared} outputs, off by {worst:.2e} at most")
    return worst if compared > 0 else numpy.inf


errors = [check(pathlib.Path(folder), sys.argv[1]) for folder in sys.argv[2:]]
sys.exit(not errors or not max(errors) <= TOLERANCE)
