from hypothesis import HealthCheck, settings

# Machines that build us are slow and shared: no deadline per example, and the same examples on every run.
settings.register_profile("ground", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ground")
