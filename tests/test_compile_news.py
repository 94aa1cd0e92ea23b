"""What a node says while torch.compile works."""

import threading

import pytest
import torch
from torch._dynamo.callback import callback_handler

from streamblocks.stream.compile_news import telling_of_compilation


@pytest.fixture
def told():
    return []


@pytest.mark.usefixtures("fresh_dynamo")
def test_each_compilation_is_told_of_once_and_nothing_after_it(told):
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    with telling_of_compilation(lambda: told.append("begins"), lambda: told.append("ends")):
        for _ in range(2):
            double(torch.ones(3))
        assert told == ["begins", "ends"]
        double(torch.ones(4))
        assert told == 2 * ["begins", "ends"]
    double(torch.ones(5))
    assert len(told) == 4
    assert not callback_handler.start_callbacks and not callback_handler.end_callbacks


@pytest.mark.usefixtures("fresh_dynamo")
def test_other_threads_and_cleared_caches(told):
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    with telling_of_compilation(lambda: told.append("begins"), lambda: told.append("ends")):
        other = threading.Thread(target=lambda: double(torch.ones(3)))
        other.start()
        other.join()
        torch.compiler.reset()
    assert told == []
