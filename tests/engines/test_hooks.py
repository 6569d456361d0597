"""What a build logs and shows, with TensorRT-RTX's own classes to derive from."""

import io
import os

import pytest

from hstu_trt.engines.hooks import BuildLog, make_logger, make_monitor
from hstu_trt.engines.modules import TENSORRT_RTX, open_module

if os.environ.get("CI") != "true":
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13")


@pytest.fixture(scope="module")
def rtx():
    return open_module(TENSORRT_RTX)


def test_progress_is_shown_on_a_terminal_only(rtx):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream in (Terminal(), io.StringIO()):
        log = BuildLog()
        monitor = make_monitor(rtx.module, log, "hstu", stream)
        monitor.phase_start("Building engine", None, 6)
        monitor.phase_start("Parsing", "Building engine", 4)
        assert monitor.step_complete("Parsing", 1)
        shown = stream.getvalue()
        log.interrupted = True
        assert not monitor.step_complete("Parsing", 2)
        monitor.phase_finish("Parsing")
        monitor.phase_finish("Building engine")
        assert ("hstu [" in shown and "Building engine 0/6, Parsing 2/4" in shown) == stream.isatty()
        assert stream.getvalue().endswith("\r\033[K") == stream.isatty()


def test_the_log_keeps_errors_and_activations(rtx):
    log = BuildLog()
    logger = make_logger(rtx.module, log)
    severity = rtx.module.ILogger
    logger.log(severity.VERBOSE, "Total Activation Memory: 12 bytes")
    logger.log(severity.VERBOSE, "x\nName: a, LayerType: gemm, Inputs\nName: b, LayerType: deallocate, Inputs")
    logger.log(severity.ERROR, "no")
    logger.log(severity.WARNING, "hm")
    assert (log.activation_bytes, log.errors, log.kernels) == ([12], ["no"], 1)
