"""The preconditioner service: gRPC server, scheduler and Ray pool that compute inverse roots."""
