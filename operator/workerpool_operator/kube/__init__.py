"""Kubernetes behind the ports: workers as Deployments, broker URLs from Secrets, reports as status and Events."""
