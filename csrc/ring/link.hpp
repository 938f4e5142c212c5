// MPI point-to-point as the ring needs it: bytes between two ranks, every return code checked.
#pragma once

#include <mpi.h>

#include <cstddef>
#include <stdexcept>

namespace hvd_train::ring {

// A peer died, or the communicator was revoked because of one.
class PeerLost : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Any other error of MPI.
class MPIFailure : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Throws PeerLost or MPIFailure unless `code` is MPI_SUCCESS.
void check(int code, const char* what);

// A message under way. It must be complete, or its communicator of no more use, before its memory is given back.
class Message {
  public:
    // Starts to send or to receive `num_bytes` bytes, at most INT_MAX.
    static Message send(MPI_Comm comm, const std::byte* data, std::size_t num_bytes, int rank, int tag);
    static Message receive(MPI_Comm comm, std::byte* data, std::size_t num_bytes, int rank, int tag);

    // Whether it is complete; lets MPI make progress.
    bool test();

  private:
    MPI_Request request_ = MPI_REQUEST_NULL;
};

}  // namespace hvd_train::ring
