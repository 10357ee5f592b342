import pytest

from tests.kernels.steps import compiling


@pytest.fixture(params=["off", "on"])
def compile_mode(request):
    with compiling(request.param):
        yield request.param
