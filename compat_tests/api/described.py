"""The running server's own `/openapi.json`, to hold its answers against."""

import json
import re

from jsonschema import Draft202012Validator


class Description:
    """One server's document."""

    def __init__(self, document):
        self.document = document

    @classmethod
    async def of(cls, gateway):
        async with gateway.get("/openapi.json") as response:
            assert response.status == 200
            return cls(await response.json())

    @property
    def operations(self):
        """(method, path) to operation."""
        return {
            (method.upper(), path): operation
            for path, methods in self.document["paths"].items()
            for method, operation in methods.items()
        }

    def operation(self, method, path):
        """The operation of a path as it is called: with or without /v1, with its parts filled in."""
        bare = path.removeprefix("/v1").rstrip("/") or "/"
        for (told_method, told_path), operation in self.operations.items():
            pattern = re.sub(r"\\\{\w+\\\}", ".+", re.escape(told_path.removeprefix("/v1")))
            if told_method == method and re.fullmatch(pattern, bare):
                return operation
        raise AssertionError(f"{method} {path} is not described")

    def content(self, method, path, status, media_type):
        """What is said of one answer."""
        response = self.operation(method, path)["responses"][str(status)]
        if "$ref" in response:
            response = self.document["components"]["responses"][response["$ref"].rsplit("/", 1)[1]]
        return response["content"][media_type]

    def check(self, schema, value):
        """Raise where ``value`` is not as ``schema`` says."""
        Draft202012Validator({**schema, "components": self.document["components"]}).validate(value)

    async def hold(self, method, path, response):
        """Check one response; its body as JSON, or the JSON of its events."""
        content = self.content(method, path, response.status, response.content_type)
        if response.content_type != "text/event-stream":
            body = await response.json()
            self.check(content["schema"], body)
            return body
        events = [line.removeprefix("data: ") for line in (await response.text()).split("\n\n") if line]
        assert events.pop() == "[DONE]"
        events = [json.loads(event) for event in events]
        for event in events:
            self.check(content["x-event-schema"], event)
        return events
