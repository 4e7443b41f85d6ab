"""What the engine is told of a request that comes to nothing on this side."""

import pytest

from helix_gateway.core.request import Request, SamplingParams
from helix_gateway.service.api import GenerationCall, StopStrings
from helix_gateway.service.client import EngineClient
from helix_gateway.service.messages import Cancel, Ready, Submit
from helix_gateway.service.settings import EngineSettings


class Recording(EngineClient):
    """A client of an engine that is ready and only listens."""

    def __init__(self, tokenizer):
        super().__init__(EngineSettings(model_path="none"), tokenizer)
        self.commands = []
        self._receive(Ready(64, 258))

    def _send(self, command):
        self.commands.append(command)

    def _sink(self, backlog):
        return backlog.put


class NoText:
    def detokenizer(self, **_):
        raise ZeroDivisionError


def test_an_engine_does_not_go_on_with_a_request_whose_text_cannot_be_made():
    client = Recording(NoText())
    call = GenerationCall(
        request=Request(request_id="r", prompt_token_ids=[1, 2], sampling=SamplingParams(n=2)), stop=StopStrings()
    )
    for _ in range(2):  # the second finds the id free again
        with pytest.raises(ZeroDivisionError):
            client.generate(call)
    assert client.commands == 2 * [Submit(call), Cancel("r")]
