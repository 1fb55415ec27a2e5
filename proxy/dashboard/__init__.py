"""The page that the proxy serves at ``/``: where the time of requests goes, live."""
