"""What clients call; gRPC stops here."""
