"""transformers serve's own app over an exported folder, in a process that cannot import twotower; see test_serve.py.

`python -I serve_app.py FOLDER [continuous-batching]` prints its port and serves until it is stopped. The command line
of `transformers serve` looks for the model's class in transformers itself, which holds no remote code; what is
different here is that one method of its model manager.
"""

import socket
import sys

sys.modules["twotower"] = None  # importing it is now an ImportError

import torch  # noqa: E402
import uvicorn  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.cli.serving.chat_completion import ChatCompletionHandler  # noqa: E402
from transformers.cli.serving.completion import CompletionHandler  # noqa: E402
from transformers.cli.serving.model_manager import ModelManager  # noqa: E402
from transformers.cli.serving.response import ResponseHandler  # noqa: E402
from transformers.cli.serving.server import build_server  # noqa: E402
from transformers.cli.serving.systemone import SystemOneHandler  # noqa: E402
from transformers.cli.serving.transcription import TranscriptionHandler  # noqa: E402
from transformers.cli.serving.utils import GenerationState  # noqa: E402


class RemoteCodeManager(ModelManager):
    def _load_model(self, model_id_and_revision, **unused):
        folder = model_id_and_revision.split("@")[0]
        return AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, trust_remote_code=self.trust_remote_code)


def main(folder, batching=None):
    torch.set_num_threads(1)
    manager = RemoteCodeManager(device="cpu", trust_remote_code=True, force_model=folder)
    state = GenerationState(continuous_batching=batching == "continuous-batching")
    kinds = (ChatCompletionHandler, CompletionHandler, ResponseHandler, TranscriptionHandler, SystemOneHandler)
    app = build_server(manager, *(kind(manager, state) for kind in kinds), state)
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main(*sys.argv[1:])
