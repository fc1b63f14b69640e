"""What operators see: logs (later metrics and a status page)."""
