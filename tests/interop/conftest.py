import pytest

from tests.interop.libraries import CASES


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def library(request):
    case, name, kwargs = request.param
    return case(name, **kwargs)
