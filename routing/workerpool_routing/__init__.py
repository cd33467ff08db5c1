"""What API pods and workers import: admits each job, routes it to a tier, and fences its attempts."""
