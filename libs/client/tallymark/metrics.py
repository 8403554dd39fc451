"""Metrics: creating, reading, changing and deleting their schemas."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tallymark._gateways import details_repeated
from tallymark_protocol import schema as rules
from tallymark_protocol.errors import AlreadyExistsError, InvalidRequestError, NotFoundError
from tallymark_protocol.messages import (
    Message,
    MetricCreate,
    MetricDelete,
    MetricList,
    MetricsResult,
    MetricUpdate,
)
from tallymark_protocol.model import MetricSchema


class AsyncMetrics:
    """The metrics of a cluster: `client.metrics`. Every call takes `timeout`, in seconds.

    Errors of all calls: `UnavailableError` and `BackpressureError` where the service couldn't answer within the
    timeout (call again), `InvalidRequestError` where the request can never succeed.
    """

    def __init__(self, call: Callable[[Message, type[Any], float | None], Awaitable[Any]]) -> None:
        self._call = call

    async def create(self, schema: MetricSchema, *, timeout: float | None = None) -> MetricSchema:
        """Create a metric; events for it are accepted from then on.

        Raises:
            AlreadyExistsError: the code is taken; `identical` tells whether by this very schema, in which case
                nothing is left to do.
            InvalidRequestError: the schema breaks a rule.
        """
        _check_schema(schema)
        try:
            result = await self._call(MetricCreate(schema), MetricsResult, timeout)
        except AlreadyExistsError as error:
            if error.identical and details_repeated(error):
                return schema  # an earlier try of this call created it, and its answer was lost
            raise
        return _single(result, schema)

    async def update(self, schema: MetricSchema, *, timeout: float | None = None) -> MetricSchema:
        """Change a metric: add thresholds, add values to a dimension, change the description. Nothing else.

        Raises:
            NotFoundError: no metric has this code.
            InvalidRequestError: the change is not one of these.
        """
        _check_schema(schema)
        return _single(await self._call(MetricUpdate(schema), MetricsResult, timeout), schema)

    async def get(self, code: str, *, timeout: float | None = None) -> MetricSchema:
        """Return a metric's schema.

        Raises:
            NotFoundError: no metric has this code.
        """
        for schema in await self.list(timeout=timeout):
            if schema.code == code:
                return schema
        raise NotFoundError(f"no metric has the code {code!r:.80}")

    async def list(self, *, timeout: float | None = None) -> list[MetricSchema]:
        """Return all metrics' schemas, by code."""
        result = await self._call(MetricList(), MetricsResult, timeout)
        return sorted((info.schema for info in result.metrics), key=lambda schema: schema.code)

    async def delete(self, code: str, *, timeout: float | None = None) -> None:
        """Delete a metric: events for it are refused from then on. Those stored stay, under the old metric.

        Raises:
            NotFoundError: no metric has this code.
        """
        try:
            await self._call(MetricDelete(code), MetricsResult, timeout)
        except NotFoundError as error:
            if not details_repeated(error):
                raise


def _check_schema(schema: MetricSchema) -> None:
    if not isinstance(schema, MetricSchema):
        raise InvalidRequestError(f"a metric is created from a MetricSchema, not {type(schema).__name__}")
    # What can't be encoded has to be said here; the zone's data is the server's.
    rules.validate(schema, check_zone=False)


def _single(result: MetricsResult, sent: MetricSchema) -> MetricSchema:
    return result.metrics[0].schema if result.metrics else sent
