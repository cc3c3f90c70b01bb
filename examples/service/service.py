"""A service with several models under one memory budget: start-up, readiness after verification, answers, metrics.

    LADEZEIT_MODELS=models.json LADEZEIT_HOST_BUDGET=8GiB uvicorn --factory service:from_environment

What to look at: `/ready` answers 503 until the required models are loaded *and verified*; `/generate` holds
a model for the time of one answer, so that none is unloaded under a request; a model that is not in memory is loaded
by the request that wants it, in the place of the one that was used longest ago.
"""

import os
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, Field

from ladezeit import ModelManager
from ladezeit.errors import ConfigError, LadezeitError
from ladezeit.serving.model_cache import BudgetError
from ladezeit.serving.production_log import ProductionLog
from metrics import LoadMetrics


class Question(BaseModel):
    """What is asked of a model: a text, or token ids where its checkpoint has no tokenizer."""

    model: str
    prompt: str | None = None
    token_ids: list[int] = Field(default_factory=list, max_length=4096)
    new_tokens: int = Field(default=16, ge=1, le=256)


class Answer(BaseModel):
    """What it says; `text` is None where its checkpoint has no tokenizer."""

    model: str
    token_ids: list[int]
    text: str | None


class Readiness:
    """Loads what has to be there, in the background, and knows whether it is there."""

    def __init__(self, manager: ModelManager, names: Iterable[str]) -> None:
        self.names = list(names)
        self.error: str | None = None
        self.reached = False
        self._manager = manager

    def start(self) -> None:
        """Begin; the server answers meanwhile."""
        threading.Thread(target=self._load, name="start-up", daemon=True).start()

    def _load(self) -> None:
        try:
            self._manager.preload(self.names)
            self.reached = True
        except LadezeitError as error:
            self.error = str(error)


def make_app(manager: ModelManager, metrics: LoadMetrics, at_start: Iterable[str]) -> FastAPI:
    """Return the application; the models in `at_start` are loaded before it is ready."""
    readiness = Readiness(manager, at_start)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        readiness.start()
        yield
        manager.close()

    app = FastAPI(title="models under a budget", lifespan=lifespan)

    @app.get("/ready")
    def ready(response: Response) -> dict[str, Any]:
        response.status_code = 200 if readiness.reached else 503
        return {"ready": readiness.reached, "models": readiness.names, "error": readiness.error}

    @app.get("/status")
    def status() -> dict[str, Any]:
        return manager.status().to_dict()

    @app.get("/metrics")
    def exposition() -> Response:
        return Response(metrics.exposition(manager.status()), media_type="text/plain; version=0.0.4")

    @app.post("/generate")
    def generate(question: Question) -> Answer:
        try:
            with manager.use(question.model) as used:
                return answer(question, used.model, used.tokenizer)
        except ConfigError as error:
            raise HTTPException(404, str(error)) from error
        except BudgetError as error:  # others use what is in memory: come back later
            raise HTTPException(503, str(error), headers={"Retry-After": "5"}) from error
        except LadezeitError as error:
            raise HTTPException(500, str(error)) from error

    return app


def answer(question: Question, model: Any, tokenizer: Any) -> Answer:
    """Let the model continue what is asked, greedily."""
    import torch

    ids = question.token_ids or (tokenizer(question.prompt or "").input_ids if tokenizer is not None else [])
    if not ids:
        raise HTTPException(422, "give a prompt, or token_ids where the model has no tokenizer")
    asked = torch.tensor([ids], device=next(model.parameters()).device)
    with torch.inference_mode():
        spoken = model.generate(
            asked, attention_mask=torch.ones_like(asked), max_new_tokens=question.new_tokens, do_sample=False
        )
    new = spoken[0, len(ids) :].tolist()
    text = tokenizer.decode(new, skip_special_tokens=True) if tokenizer is not None else None
    return Answer(model=question.model, token_ids=new, text=text)


def from_environment() -> FastAPI:
    """Return the application that the environment describes: models, budgets, what is loaded first, where loads go."""
    metrics = LoadMetrics()
    listeners: list[Any] = [metrics]
    if outputs := os.environ.get("LADEZEIT_OUTPUTS"):
        listeners.append(ProductionLog(outputs))
    manager = ModelManager(
        os.environ["LADEZEIT_MODELS"],
        gpu_budget=os.environ.get("LADEZEIT_GPU_BUDGET"),
        host_budget=os.environ.get("LADEZEIT_HOST_BUDGET"),
        listeners=listeners,
    )
    at_start = os.environ.get("LADEZEIT_AT_START")
    return make_app(manager, metrics, at_start.split(",") if at_start else manager.names[:1])
