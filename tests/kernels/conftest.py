import pytest

from tests.kernels.steps import compiling


@pytest.fixture(params=["off", pytest.param("on", marks=pytest.mark.slow)])
def compile_mode(request):
    with compiling(request.param):
        yield request.param
