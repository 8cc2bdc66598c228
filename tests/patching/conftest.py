"""Models of diffusers, small and random; "auto" is what a CPU has."""

from tests.model.conftest import auto_is_what_a_cpu_has  # noqa: F401
