#include "ring/link.hpp"

#include <climits>
#include <string>

#if defined(OPEN_MPI)
#include <mpi-ext.h>
#endif

namespace hvd_train::ring {
namespace {

bool is_loss([[maybe_unused]] int error_class) {
#if defined(MPIX_ERR_PROC_FAILED) || defined(OMPI_HAVE_MPI_EXT_FTMPI)
    return error_class == MPIX_ERR_PROC_FAILED || error_class == MPIX_ERR_PROC_FAILED_PENDING ||
           error_class == MPIX_ERR_REVOKED;
#else
    return false;
#endif
}

int count(std::size_t num_bytes) {
    if (num_bytes > INT_MAX) throw std::invalid_argument("a message is longer than MPI can count");
    return static_cast<int>(num_bytes);
}

}  // namespace

void check(int code, const char* what) {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    int error_class = code;
    MPI_Error_class(code, &error_class);
    MPI_Error_string(code, text, &length);
    const std::string message = std::string(what) + ": " + text;
    if (is_loss(error_class)) throw PeerLost(message);
    throw MPIFailure(message);
}

Message Message::send(MPI_Comm comm, const std::byte* data, std::size_t num_bytes, int rank, int tag) {
    Message message;
    check(MPI_Isend(data, count(num_bytes), MPI_BYTE, rank, tag, comm, &message.request_), "MPI_Isend");
    return message;
}

Message Message::receive(MPI_Comm comm, std::byte* data, std::size_t num_bytes, int rank, int tag) {
    Message message;
    check(MPI_Irecv(data, count(num_bytes), MPI_BYTE, rank, tag, comm, &message.request_), "MPI_Irecv");
    return message;
}

bool Message::test() {
    int done = 0;
    check(MPI_Test(&request_, &done, MPI_STATUS_IGNORE), "MPI_Test");
    return done != 0;
}

}  // namespace hvd_train::ring
