"""A server that answers as vLLM does, or as it should not."""

import torch
from fake_server import LocalServer


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FakeServer(LocalServer):
    """vLLM as far as it is asked: `route` "pooling" or "v1/completions"."""

    def __init__(self, model, root, route="pooling", key=None, port=0):
        super().__init__(key, port=port)
        self.model, self.route = model, route
        self.models = {"object": "list", "data": [{"id": "teacher", "root": root, "max_model_len": 32}]}

    @torch.no_grad()
    def answer(self, path, payload):
        if path == "/v1/models":
            return self.models
        if path != f"/{self.route}":
            return None
        tokens = payload["input" if self.route == "pooling" else "prompt"]
        with self.lock:
            if self.route == "pooling":
                hidden = self.model.base_model(torch.tensor([tokens])).last_hidden_state[0]
                if payload["encoding_format"] == "float":
                    return {"data": [{"index": 0, "data": hidden.float().tolist()}]}
                return hidden.to(DTYPES[payload["embed_dtype"]]).view(torch.uint8).numpy().tobytes()
            logps = self.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        k = payload["prompt_logprobs"]
        positions = [None]
        for row, token in zip(logps, tokens[1:], strict=False):
            known = {token, *(row.topk(k).indices.tolist() if k else [])}
            positions.append({str(index): {"logprob": row[index].item(), "rank": 1} for index in known})
        return {"choices": [{"index": 0, "prompt_logprobs": positions}]}
