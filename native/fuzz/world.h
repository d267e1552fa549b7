/* SPDX-License-Identifier: MIT */
/* world.h - what the calls of an input work on, and where their arguments come from. */
#ifndef WORLD_H
#define WORLD_H

#include <stdbool.h>
#include <stdint.h>

#include "pymirror.h"

enum { PAGE = 4096, PAGES = 16, ARRAY = 64, SLOTS = 4, CALLS_MAX = 64 };

#define MILLISECOND 1000000ULL

struct world {
    const uint8_t *at, *end;
    pm_mm *mm;
    char *room, *mem;    /* what calls reach beyond the memory is nobody's */
    uint8_t byte[PAGES]; /* what is in each page */
    bool gone[PAGES];    /* or nobody knows */
    bool lies;
    pm_sub *sub[SLOTS];
    uint64_t seq[SLOTS];
    pm_inv *inv;
    pm_table *table;
    pm_pin *pin[SLOTS];
    pm_devmem *vram[SLOTS];
    pm_devmem *arena;
    pm_domain *domain;
    pm_dmap *dmap[SLOTS];
    pm_iova_space *iovas;
    pm_spans *spans;
    pm_span *span[SLOTS];
    uint64_t iova[SLOTS], pfns[ARRAY], others[ARRAY], slots[SLOTS][ARRAY];
    uint8_t bytes[ARRAY], buf[4 * PAGE];
};

extern struct world w;

/* The next of the input, 0 behind its end. */
uint8_t next(void);
uint64_t wide(void);
/* An address: of the memory, mostly. */
uint64_t addr(void);
/* One of the memory, or one that is nobody's: what would be done to it is done. */
uint64_t own_addr(void);
/* Pages, so that an array has room for them. */
uint64_t few(void);
uint64_t until(uint64_t start);
uint64_t *pfns(void);
/* Pages of the memory that [start, end) has. */
void each_page(uint64_t start, uint64_t end, void (*fn)(int page));
void now_zero(int page);
void now_gone(int page);

/* Slots that were set aside, and that no page has come to. */
void give_back(int i);

/* A call each, or what a caller does with one. */
void call_subs(void);
void call_invalidation(void);
void call_walk(void);
void call_table(void);
void call_access(void);
void call_atomic(void);
void call_memory(void);
void call_watching(void);
void call_message(void);
void call_looks(void);
void call_failure(void);
void call_pins(void);
void call_memories(void);
void call_migration(void);
void call_exclusive(void);
void call_dma(void);
void call_dma_access(void);
void call_iovas(void);
void call_spans(void);

#endif
