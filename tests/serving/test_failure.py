"""The cause of a failed start, out of the server's log."""

import pytest

from hstu_trt.serving.supervision.failure import MOST_LINES, cause_of_failure

NOISE = """\
W1122 08:24:33.408357 6958 pinned_memory_manager.cc:273] "Unable to allocate pinned system memory"
E1122 08:24:33.408614 6958 server.cc:241] "CudaDriverHelper has not been initialized."
I1122 08:24:33.409993 6958 model_lifecycle.cc:472] "loading: hstu:1"
"""
WRAPPED = r"Internal: TritonModelException: hstu: x.onnx: cut short\n\nAt:\n  /a/triton_models.py(41): initialize\n"
FAILED = f"""\
E1122 08:24:34.1 6958 model_lifecycle.cc:642] "failed to load 'hstu' version 1: {WRAPPED}"
error: creating server: Internal - failed to load all models
"""
STREAM = 'E1122 09:06:01.0 6958 x.cc:9] "unable to create stream for ranking: CUDA driver version is insufficient"\n'
TABLE = "+-------+--------+\n| Model | Status |\n\n"
PORT = 'E1122 08:24:34.1 6958 main.cc:9] "failed to start GRPC service: Unavailable - Socket in use"\n'

LOGS = {
    "a model": (NOISE + FAILED, ["model 'hstu': hstu: x.onnx: cut short"]),
    "the server": (NOISE + PORT, ["failed to start GRPC service: Unavailable - Socket in use"]),
    "no error line": ("loading\nSegmentation fault\n", ["loading", "Segmentation fault"]),
    "no cause": (NOISE + STREAM + TABLE, []),
    "nothing": ("", []),
}


@pytest.mark.parametrize(("log", "lines"), LOGS.values(), ids=LOGS)
def test_cause(tmp_path, log, lines):
    (tmp_path / "log").write_text(log)
    assert cause_of_failure(tmp_path / "log") == lines


def test_long_logs_are_cut(tmp_path):
    (tmp_path / "log").write_text(PORT * 200)
    assert len(cause_of_failure(tmp_path / "log")) == MOST_LINES


def test_no_log(tmp_path):
    assert cause_of_failure(tmp_path / "log") == []
