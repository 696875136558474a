"""One thread per library: the suite shares two cores with the services that it starts."""

import os

from hypothesis import settings

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# Wall time says nothing on a shared machine; examples are the same in every run.
settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption("--whole-catalogue", action="store_true", help="the long form of tests/faults too")
    parser.addoption("--faults-json", metavar="PATH", help="write the table of tests/faults to this file")
