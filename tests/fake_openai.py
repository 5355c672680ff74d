"""A chat completions endpoint that answers as OpenAI's does, or as it should not."""

from fake_server import LocalServer, in_turn


def completion(content):
    """The answer of a model that says `content`."""
    message = {"role": "assistant", "content": content}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


class FakeOpenAI(LocalServer):
    """`say(messages)` is the model; the first requests meet `faults`."""

    def __init__(self, say, faults=(), key=None):
        super().__init__(key, in_turn(faults))
        self.say = say
        self.url += "/v1"

    def answer(self, path, payload):
        return completion(self.say(payload["messages"])) if path == "/v1/chat/completions" else None
