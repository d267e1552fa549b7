/* SPDX-License-Identifier: MIT */
/* fuzz.h - between the driver, which makes inputs, and the target, which makes calls of them. */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>

/* Makes the calls that the input says, in a world of its own. Dies when something is wrong. */
void fuzz_one(const uint8_t *data, size_t len);
/* Calls made so far. */
uint64_t fuzz_calls(void);
/* Ends the process with this on stderr, and the input in a file. */
_Noreturn void fuzz_fail(const char *what);

struct pm_mm;
/* A message as if from the kernel: what it says need not be so. */
void fuzz_message(struct pm_mm *mm, unsigned event, uint64_t from, uint64_t to, uint64_t len);

#endif
