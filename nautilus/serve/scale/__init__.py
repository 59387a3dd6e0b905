"""One server, several engines: replicas in processes of their own, on Ray Serve."""
