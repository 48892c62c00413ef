"""The service: replicas, the router and its doors; it knows neither Ray nor torch."""
