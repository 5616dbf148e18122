"""The series of a gateway."""

from collections.abc import Sequence

from aiohttp import ClientSession
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from yarl import URL


async def samples_of(metrics: URL) -> Sequence[Sample]:
    """Return the samples of all series on a page of metrics."""
    async with ClientSession(raise_for_status=True) as session, session.get(metrics) as response:
        families = text_string_to_metric_families(await response.text())
    return [sample for family in families for sample in family.samples]
