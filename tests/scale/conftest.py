import pytest

from .envoy import envoy
from .front import Balancer
from .nginx import nginx


@pytest.fixture(params=[nginx, envoy])
def balancer(request: pytest.FixtureRequest) -> Balancer:
    balancer: Balancer = request.param
    return balancer
