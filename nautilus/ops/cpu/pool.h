// Threads that share out numbered pieces of work. Which thread takes which piece never changes a result.
#pragma once

#include <stdint.h>

using Piece = void (*)(void* context, int64_t item, int thread);

// Runs piece(context, item, thread) for every item below `items` on at most `threads` threads, the caller among them.
void run_pieces(int threads, int64_t items, Piece piece, void* context);

// body(context), with the threads of its calls of run_pieces waiting for the next one instead of leaving.
void stay_together(int threads, void (*body)(void*), void* context);

// From here on the pieces run in the OpenMP team that another library keeps (torch's libgomp), given its GOMP_parallel
// and omp_get_thread_num: two teams would wake while the other still spins. Null: threads of our own.
void borrow_team(void* parallel, void* thread_number);
